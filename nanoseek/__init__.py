"""What the scripts share: each file has one noun. Nothing here reads a command line or prints."""
