"""From a JobSpec and what is known of a cluster to plain dicts (ADR 0030). Pure: the same input, the same bytes."""
