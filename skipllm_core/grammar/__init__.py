"""What a sequence's text has to follow: grammars compiled, and the tokens they allow next."""
