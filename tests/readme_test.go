package tests

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	return string(text)
}

func TestReadmeShowsTheTopologyThatRuns(t *testing.T) {
	t.Parallel()
	printed, err := exec.Command(binary, "topology").Output()
	require.NoError(t, err)
	require.Contains(t, readme(t), "```\n"+string(printed)+"```", "README.md must show what takeout topology prints:\n%s", printed)
}

func TestReadmeListsEverySetting(t *testing.T) {
	t.Parallel()
	help, err := exec.Command(binary, "serve", "--help").Output()
	require.NoError(t, err)
	settings := regexp.MustCompile(`\$(TAKEOUT_[A-Z_]+)`).FindAllSubmatch(help, -1)
	require.NotEmpty(t, settings)
	text := readme(t)
	for _, s := range settings {
		require.Contains(t, text, "`"+string(s[1])+"`", "README.md must describe the setting")
	}
	for _, named := range regexp.MustCompile("`(TAKEOUT_[A-Z_]+)`").FindAllStringSubmatch(text, -1) {
		name := strings.TrimSuffix(named[1], "_FILE")
		if strings.HasPrefix(name, "TAKEOUT_TEST_") || name == "TAKEOUT_URL" {
			continue
		}
		require.True(t, bytes.Contains(help, []byte("$"+name)), "README.md describes %s, which is no setting", name)
	}
}

// docs/bad-input.md says where each kind of bad input is tried, and each of these tests exists.
func TestTestsThatTheDocumentsNameExist(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/bad-input.md")
	require.NoError(t, err)
	tests := map[string]bool{}
	require.NoError(t, filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, found := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`).FindAllSubmatch(source, -1) {
			tests[string(found[1])] = true
		}
		return err
	}))
	named := regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z]\w+`).FindAllString(string(text), -1)
	require.Greater(t, len(named), 60)
	for _, name := range named {
		require.True(t, tests[name] || name == "FuzzOrder", "there is no %s", name)
	}
}
