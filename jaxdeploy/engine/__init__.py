"""The engine: requests in, tokens out. ``engine.Engine`` is the loop; ``generator.Generator`` adds text."""
