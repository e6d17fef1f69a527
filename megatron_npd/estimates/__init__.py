"""What a run will take, before it is started: memory of each role, space on disk, time of each role."""
