"""What `ktrain doctor` looks at: checks of a cluster, of a job on it, and of this machine (ADR 0044).

A check looks and gives findings. Nothing here prints; nothing is created but what `--active` asks for.
"""
