"""One run's life: the orchestrator, its directory, and what is made of what it found."""
