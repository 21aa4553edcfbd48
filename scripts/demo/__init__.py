"""What the bundled model is made from: dialogues, tokenizer, training. ``scripts/train_demo.py`` runs it."""
