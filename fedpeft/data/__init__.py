"""From files to batches: `sources` reads rows, `encoding` makes tensors of them, `partition` says who holds which."""
