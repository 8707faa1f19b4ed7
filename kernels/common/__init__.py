"""What every op shares: backend choice, argument checks, the chunk layout of packed documents."""
