"""The paper's three tasks, for any model: what is asked, how it is judged, what is reported."""
