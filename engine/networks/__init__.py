"""What is sampled: a network's spec, its checkpoint and its graphs. ADD A MODEL FAMILY here."""
