package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTextOfOthersDoesNothingToTheTerminal(t *testing.T) {
	t.Parallel()
	require.Equal(t, "a [31mb c", brief("a\x1b[31mb\nc"))
	require.Len(t, []rune(brief(string(make([]byte, 1000)))), 70)
}
