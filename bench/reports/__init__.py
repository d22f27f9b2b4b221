"""Results told: tables, the README's rows, the page, and plots."""
