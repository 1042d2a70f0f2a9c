"""Push an output to the Hub: decide whether it may go there, choose its files, send them as one commit."""
