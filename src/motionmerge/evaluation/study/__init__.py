"""The human study: pairs of videos judged by people, from its size to its result."""
