"""How replies are generated: settings of requests, and defaults of a checkpoint."""
