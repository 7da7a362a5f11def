"""What a round's uploads are combined into."""
