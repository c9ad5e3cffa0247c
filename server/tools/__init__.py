"""What an answer has to look like, and what is read out of it."""
