"""Who does units of work: this process, several processes, Ray. What a unit is, the caller knows."""
