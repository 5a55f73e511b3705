"""The teacher's side: what a teacher must offer, and the loop that turns views into stored targets."""
