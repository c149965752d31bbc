"""One video, and the noisy and clean halves of many."""
