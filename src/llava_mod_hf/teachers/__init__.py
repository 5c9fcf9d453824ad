"""Who answers for a student's rows, live or written before."""
