"""One file of facts per model family; ``jaxdeploy.models.registry`` lists them.

A family defines ``model_config`` (``config.json`` → ``ModelConfig``) and ``weights`` (the checkpoint's tensors →
parameters). It has no layers.
"""
