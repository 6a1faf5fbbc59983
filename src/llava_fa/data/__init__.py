"""What comes from outside: text files, pictures, samples."""
