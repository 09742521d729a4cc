package tests

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	program "takeout/verify"
)

func TestEveryFaultHasAScenarioThatExistsOrAReason(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/faults.md")
	require.NoError(t, err)
	exist := testNames(t)
	next := 1
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if _, err := strconv.Atoi(strings.TrimSpace(cells[0])); err != nil {
			continue
		}
		require.Equal(t, strconv.Itoa(next), strings.TrimSpace(cells[0]), "faults have no gaps")
		next++
		require.Len(t, cells, 4, "%s", line)
		shown := strings.TrimSpace(cells[3])
		require.True(t, shown != "" || strings.Contains(cells[2], "cannot happen"), "%s", line)
		for _, name := range regexp.MustCompile(`\bTest\w+`).FindAllString(shown, -1) {
			require.True(t, exist[name], "fault %s names %s, which does not exist", cells[0], name)
		}
		for _, kind := range regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(shown, -1) {
			require.Contains(t, program.Kinds(program.Servers), kind[1], "fault %s", cells[0])
		}
	}
	require.Equal(t, 67, next)
}

// testNames returns the tests of all packages, whatever they are built for.
func testNames(t testing.TB) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	require.NoError(t, filepath.WalkDir("..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, declaration := range file.Decls {
			if f, ok := declaration.(*ast.FuncDecl); ok && f.Recv == nil {
				names[f.Name.Name] = true
			}
		}
		return nil
	}))
	return names
}
