"""What a user asked for: which model, which experts, checked and loaded."""
