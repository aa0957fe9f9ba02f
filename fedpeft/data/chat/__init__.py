"""Conversations as tokens: templates that write them, which tokens count, and what gives way where they are long."""
