"""What damages pictures: noise and text over them, for learning to take it away again."""
