"""The signals inside other people's trainers; nothing here is imported by the package itself."""
