"""One phase of training, and evaluation. No module here depends on one task or checkpoint format."""
