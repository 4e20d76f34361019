"""The errors a caller can cause.  Every message says what was expected, what was found, where, and
what to do."""


class SecateurError(ValueError):
    """Root of all errors that the caller can mend.  A broken invariant of our own is an
    ``AssertionError`` instead."""


class CaptureError(SecateurError):
    """The model cannot be captured; names the module and the reason."""


class UnsupportedOp(SecateurError):
    """An op of the graph has no axis rule; names the op, the node, the module path and the
    decorator to add."""


class EditError(SecateurError):
    """An edit names an unknown or locked group, or units that the group does not have."""


class PatternError(SecateurError):
    """A pattern does not parse, does not fit a weight, or a score cannot be ranked; says where and
    what to do."""


class VerificationError(SecateurError):
    """A Program breaks one of the verifier's checks; names the check and the node or parameter."""


class SourceError(SecateurError):
    """A model folder is missing, damaged, unsafe, or disagrees with its configuration."""


class ArtifactError(SecateurError):
    """An artifact folder cannot be written, is unfinished, or does not hold what its manifest
    says."""


class PipelineError(SecateurError):
    """A pipeline text or a recipe does not parse, names an unknown pass or option, or orders passes
    wrongly."""
