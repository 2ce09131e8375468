"""How a directory of code gets into a pod: packed, named by its digest, proven, unpacked (ADR 0034)."""
