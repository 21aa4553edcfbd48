"""One file of facts per model family; ``jaxdeploy.models.registry`` lists them.

A family defines ``ARCHITECTURES`` (names in ``config.json``), ``model_config`` (its fields → ``ModelConfig``) and
``weights`` (the checkpoint's tensors → parameters). It has no layers of its own.
"""
