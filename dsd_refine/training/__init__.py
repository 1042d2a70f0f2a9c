"""One phase of training, and evaluation. Nothing here knows one task, or a checkpoint format."""
