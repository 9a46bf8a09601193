"""From the sharer's space into the receiver's: the network (translator.py) and its two halves beside their models
(halves.py); the fuser's network (fuser.py) and its two sides (fusing.py): which tokens meet (pairs.py), their keys and
values (slots.py), the receiver's cache with what is added (enriched.py), turns before it (earlier.py); and adapters on
disk (store.py)."""
