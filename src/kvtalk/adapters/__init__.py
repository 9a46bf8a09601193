"""From the sharer's space into the receiver's."""
