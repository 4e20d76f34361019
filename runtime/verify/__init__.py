"""Whether a model folder, of ours or not, is what it says it is: every answer comes from the stored
files."""

from secateur.runtime.verify.findings import Finding, Level, Outcome, Verification
from secateur.runtime.verify.run import find_stored_faults, verify_folder

__all__ = ["Finding", "Level", "Outcome", "Verification", "find_stored_faults", "verify_folder"]
