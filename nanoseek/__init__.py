"""What the scripts share: each file has one noun, and nothing here reads a command line or prints by itself."""
