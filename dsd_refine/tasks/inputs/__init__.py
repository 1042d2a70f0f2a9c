"""What goes into a model: images, audio, tokens, texts."""
