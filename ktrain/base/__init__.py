"""Standard library only: what every other package stands on."""
