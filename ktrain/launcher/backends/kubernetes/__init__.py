"""The Kubernetes backend: sends what `render` made, watches it, and acts on it (ADR 0037)."""
