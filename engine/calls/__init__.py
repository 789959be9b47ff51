"""What a caller passes and gets: requests, conditioning, noise, batches, destinations, trajectories, pictures."""
