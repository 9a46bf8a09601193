"""Every error that kvtalk raises on purpose: one line that says what is wrong and what to do."""


class KVTalkError(Exception):
    """Base of all errors that a caller can cause and mend."""


class ModelError(KVTalkError):
    """A model or tokenizer cannot be found, loaded, trusted or supported."""


class CacheError(KVTalkError):
    """A cache has the wrong shape, holds NaN or infinity, or does not fit the model."""


class SelectionError(KVTalkError):
    """A token or layer policy is unknown or asks for what is not there."""


class CodecError(KVTalkError):
    """A codec is unknown or cannot represent the values it was given."""


class BudgetError(KVTalkError):
    """A byte budget cannot be read or cannot be met."""


class PacketError(KVTalkError):
    """A packet is malformed, damaged, or meant for another model.

    Attributes:
        field: the part of the packet that is wrong, such as ``"header"`` or ``"keys"``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"packet {field}: {message}")
        self.field = field


class AlignmentError(KVTalkError):
    """The tokens of two models cannot be matched."""


class AdapterError(KVTalkError):
    """An adapter is missing, damaged, or made for another pair of models."""


class TrainingError(KVTalkError):
    """Training cannot start, go on, or be resumed."""


class InputError(KVTalkError):
    """A context, question, file or option cannot be used as given."""
