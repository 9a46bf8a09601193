"""From the sharer's space into the receiver's: the network (translator.py), its two halves beside their models
(halves.py), and adapters on disk (store.py)."""
