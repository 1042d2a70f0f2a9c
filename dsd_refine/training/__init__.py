"""One phase of training, and evaluation. Nothing here knows a task, a recipe file or a checkpoint format."""
