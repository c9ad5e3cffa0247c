"""What the embedded model is taught: facts, sums, stories, small talk, and how strangers ask."""
