"""One adapter for each library: timm, torchvision, transformers."""
