"""Every op of the packed engine in plain PyTorch operations, on any device.

Nothing here is one-sequence-at-a-time (that is `reference/`): these are the packed, blocked forms
that run where no kernel of ours does.
"""
