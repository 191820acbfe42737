"""Tools: their code run as transactions, whatever they are and wherever their code is. No SQL, no wire."""
