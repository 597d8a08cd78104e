"""What other people's benchmarks of text to 3D take: their cameras, their pictures' encoding and their folders' names."""
