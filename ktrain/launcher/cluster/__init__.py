"""A small cluster in one process: objects of Kubernetes and what controllers do with them.

`store` keeps objects as an API server does, `resources` names their kinds. The local backend runs jobs on it, and
`ktrain.testing.FakeCluster` serves it over HTTP.
"""
