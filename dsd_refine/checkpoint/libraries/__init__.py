"""One adapter for each library: timm, torchvision, transformers. They use `checkpoint` and `data`,
never the reverse.
"""
