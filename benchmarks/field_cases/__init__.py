"""Cases from the field, rebuilt in small: what each makes, what the command must do with it, and what it did before."""
