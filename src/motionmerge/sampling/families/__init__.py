"""What each family of models can make, and how its pipeline is called."""
